"""PEFT's adapter format as a pure translation: adapter layers <-> (tensor names, adapter_config.json).

write.py and read.py do it; where PEFT's wrappers put a layer is told in names.py, what its configuration means in
config.py, how it lays out the tensors of one layer in ../peft_layout.py and in the methods. Facts of the format were
dumped from peft 0.21.2; tests/test_peft_read.py and test_peft_write.py check both ways against the installed peft.
"""

from lorakit.peft_format.config import kept
from lorakit.peft_format.read import decode
from lorakit.peft_format.write import encode, why_no_twin

__all__ = ["decode", "encode", "kept", "why_no_twin"]
