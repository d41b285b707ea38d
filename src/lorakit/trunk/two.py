"""Two models side by side, one for texts and one for images, and what runs both fast: the face of a Trunk."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.trunk.prefix import Prefix
from lorakit.trunk.segments import Segments
from lorakit.trunk.shards import Peers, Shards
from lorakit.trunk.trunk import Trunk


class TextImage(nn.Module):
    """Two models under one roof, as `text` and `image`: layer paths begin so."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.text, self.image = text, image

    def save_pretrained(self, place: str | Path) -> None:
        """Each in a folder of its own."""
        for name in ("text", "image"):
            getattr(self, name).save_pretrained(Path(place) / name)


class TextImageTrunk:
    """Runs both models of a TextImage. `shape` is that of an image; the rest is as with Trunk."""

    depth = n_blocks = 0  # nothing frozen is kept
    why_shallow = "of a text with an image nothing is kept"

    def __init__(self, model: TextImage, *, dtype: str, pad: int, keep: bool = True, shape: Sequence[int]) -> None:
        self.text = Trunk(model.text, dtype=dtype, pad=pad, keep=keep, home=model)
        self.image = Trunk(model.image, dtype=dtype, keep=keep, shape=shape, home=model)
        self.precision = dtype
        self._stack = ExitStack()

    def __enter__(self) -> "TextImageTrunk":
        with ExitStack() as stack:
            stack.enter_context(self.text)
            stack.enter_context(self.image)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def share_out(self, peers: Peers) -> None:
        """As with Trunk."""
        self.text.share_out(peers)
        self.image.share_out(peers)

    @property
    def shards(self) -> list[Shards]:
        """Of both models."""
        return self.text.shards + self.image.shards

    def both(
        self, ids: Tensor, segments: Segments, reads: Tensor | None, types: Tensor | None, pixels: Tensor
    ) -> tuple[Tensor, Any]:
        """What `Trunk.hidden` gives for the texts and `Trunk.seen` for the images."""
        return self.text.hidden(ids, segments, reads, types=types), self.image.seen(pixels)

    @property
    def why_padded(self) -> str:
        """Why texts are padded; "" if they are not."""
        return self.text.why_padded

    @property
    def width(self) -> int:
        """That of the narrower model, which may learn faster."""
        return min(self.text.width, self.image.width)

    def prefix_size(self, lengths: Sequence[int]) -> int:
        """Bytes that `prefix` would take."""
        return self.text.prefix_size(lengths)

    def prefix(self, lengths: Sequence[int], file: Path | None = None) -> Prefix:
        """Room for frozen states, of which there are none."""
        return self.text.prefix(lengths, file)

    def gradients_in_place(self, on: bool) -> None:
        """As with Trunk."""
        self.text.gradients_in_place(on)
        self.image.gradients_in_place(on)

    def clear(self) -> None:
        """As with Trunk."""
        self.text.clear()
        self.image.clear()

    def settle(self) -> None:
        """As with Trunk."""
        self.text.settle()
        self.image.settle()

    def refresh(self) -> None:
        """Takes over changed factors; to be called after every step."""
        self.text.refresh()
        self.image.refresh()
