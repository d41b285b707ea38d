"""LoRA on a CNN with a training loop of your own: scikit-learn is not needed, the digits are drawn here."""

import torch
from torch import nn

import lorakit as lk

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4),
)  # fmt: skip


def bars(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with one bright bar: which of 2 columns or 2 rows?"""
    images, labels = torch.randn(n, 1, 8, 8) * 0.3, torch.randint(0, 4, (n,))
    for image, label in zip(images, labels.tolist()):
        if label < 2:
            image[0, :, 2 + 3 * label] += 2
        else:
            image[0, 2 + 3 * (label - 2), :] += 2
    return images, labels


lk.attach(model, lk.plan(model, rank=4, layers=["all-conv", "7"], clip_rank=True))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(150):
    images, labels = bars(64)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

images, labels = bars(500)
accuracy = float((model(images).argmax(-1) == labels).double().mean())
adapter = lk.collect(model)
lk.merge(model)
merged = float((model(images).argmax(-1) == labels).double().mean())
print(f"{adapter}\naccuracy {accuracy:.3f}, merged {merged:.3f}")
assert accuracy > 0.9
assert merged == accuracy
