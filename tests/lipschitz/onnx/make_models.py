"""Recipe of the ONNX files beside it: digit classifiers made and exported by PyTorch.

pip install torch onnx scikit-learn
python make_models.py
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

HERE = Path(__file__).parent


class Branches(nn.Module):
    """Additions, concatenation, reshaping and transposing around smooth activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6)
        self.last = nn.Linear(12, 10)

    def forward(self, x):
        rows = x.reshape(-1, 8, 8)
        columns = rows.transpose(1, 2)
        a = torch.tanh(self.first(rows.mean(1) - 0.5))
        b = torch.sigmoid(self.second(columns.mean(1)))
        joined = torch.cat([a + 0.1 * b, b - a], 1)
        return self.last(joined)


MODELS = {
    "perceptron": lambda: nn.Sequential(
        nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
    ),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, stride=1, groups=2),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6, 10),
    ),
    "branches": Branches,
}


def main():
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    y = torch.tensor(labels)
    for name, make in MODELS.items():
        model = make()
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(300):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x[:1500]), y[:1500])
            loss.backward()
            optimiser.step()
        model.eval()
        right = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
        print(f"{name}: accuracy {right:.3f}")
        torch.onnx.export(
            model,
            (x[:1],),
            str(HERE / f"{name}.onnx"),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


if __name__ == "__main__":
    main()
