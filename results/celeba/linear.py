"""What a linear completion can reach: the four cells of Table 3 by the best linear predictor of the training images.

    python results/celeba/linear.py --json results/celeba/linear.json          # CelebA in data/celeba

With mu and C the mean and covariance of the training images' 3,072 numbers and S those of the given pixels, an image y is
completed as mu + C[:, S] (C[S, S] + ridge I)^-1 (y_S - mu_S), the linear rule of least squared error for these very places. It
is given C, which a meta-learner has to find in its weights, and knows nothing that is not linear. Pixels and test images are
those of train_celeba.py's evaluation.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_celeba  # noqa: E402
from common import describe_machine, mean_ci95, progress  # noqa: E402

CELLS = [("random", 10), ("random", 100), ("ordered", 10), ("ordered", 100)]


def linear_errors(train: torch.Tensor, test: torch.Tensor, given: torch.Tensor, ridge: float) -> list[float]:
    """Mean squared error of each completed image: train (I, P, 3), test (T, P, 3), given (T, k) pixel numbers."""
    train, test = train.flatten(1), test.flatten(1).double()
    mean = train.mean(0)
    covariance = ((train - mean).T @ (train - mean) / len(train)).double()
    mean, errors = mean.double(), []
    with progress(len(test), 0, f"{given.shape[1]} pixels") as bar:
        for image, pixels in zip(test, given):
            known = (pixels.unsqueeze(1) * 3 + torch.arange(3)).flatten()
            inner = covariance[known][:, known] + ridge * torch.eye(len(known), dtype=torch.float64)
            completed = mean + torch.linalg.solve(inner, image[known] - mean[known]) @ covariance[known]
            errors.append((completed - image).square().mean().item())
            bar.update(1)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/celeba", help="folder with CelebA")
    parser.add_argument("--ridge", type=float, default=1e-4, help="added to the variances (colours are in [0, 1])")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    splits = {name: torch.from_numpy(images.copy()) for name, images in train_celeba.load_splits(args.data).items()}
    train, test = train_celeba.colours(splits["train"]), train_celeba.colours(splits["test"])
    results = {"mean image": mean_ci95((test - train.mean(0)).square().mean((1, 2)).tolist())}
    for order, k in CELLS:
        rng = torch.Generator().manual_seed(train_celeba.EVALUATION_SEED)
        given = train_celeba.sample_pixels(len(test), k, order, rng)
        results[f"{order} {k}"] = mean_ci95(linear_errors(train, test, given, args.ridge))
    for cell, (value, ci95) in results.items():
        print(f"{cell}: {value:.4f} ± {ci95:.4f} over {len(test)} test images")
    if args.json:
        args.json.write_text(json.dumps({
            "command": "python results/celeba/linear.py " + " ".join(sys.argv[1:]), "ridge": args.ridge,
            "training_images": len(train), "test_images": len(test), **describe_machine(torch.device("cpu")),
            "mse": {cell: {"value": value, "ci95": ci95} for cell, (value, ci95) in results.items()}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
