"""Attaching to a Llama of 32 layers (224 matrices), and loading 20 adapters one after another, against peft."""

import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk
from common import Bench, timed

warnings.filterwarnings("ignore")


def llama() -> LlamaForCausalLM:
    """Tiny in width, so that only the work around the tensors counts."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=32,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def main() -> None:
    """Two races."""
    bench = Bench(__doc__)
    config = LoraConfig(r=8, target_modules="all-linear")
    for label, threads, clock in (("1 thread cpu", 1, time.process_time), ("2 threads wall", 2, time.perf_counter)):
        torch.set_num_threads(threads)
        values, ours_s = [], []
        for turn in range(bench.rounds(12, 5)):
            mine, theirs = llama(), llama()
            ours = timed(lambda m=mine: lk.attach(m, lk.plan(m, rank=8)), clock)
            peer = timed(lambda m=theirs: get_peft_model(m, config), clock)
            if turn:  # the first turn imports what the peers load late
                values.append(peer / ours)
                ours_s.append(ours)
        bench.ratio(f"attach 224 layers vs get_peft_model ({label})", values)
        bench.fact(f"attach 224 layers, ms ({label})", round(1e3 * statistics.median(ours_s), 1))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "peft"
        get_peft_model(llama(), config).save_pretrained(saved)
        for label, threads, clock in (("1 thread cpu", 1, time.process_time), ("2 threads wall", 2, time.perf_counter)):
            torch.set_num_threads(threads)
            totals, growth = [], []
            for _ in range(bench.rounds(3, 1)):
                mine, spent = llama(), []
                for n in range(20):
                    spent.append(timed(lambda m=mine, n=n: lk.attach(m, lk.load(saved), name=f"n{n}"), clock))
                theirs = llama()
                peer = timed(lambda m=theirs: _peft_loads(m, saved), clock)
                totals.append(peer / sum(spent))
                growth.append(statistics.median(spent[17:]) / statistics.median(spent[1:4]))
            bench.ratio(f"load 20 adapters vs load_adapter ({label})", totals)
            bench.fact(f"18th to 20th load over 2nd to 4th ({label})", round(statistics.median(growth), 3))
    bench.done()


def _peft_loads(model: LlamaForCausalLM, saved: Path) -> None:
    peft_model = PeftModel.from_pretrained(model, saved, adapter_name="n0")
    for n in range(1, 20):
        peft_model.load_adapter(saved, adapter_name=f"n{n}")


if __name__ == "__main__":
    main()
