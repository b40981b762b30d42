"""What a completion can reach that knows the training images' statistics: the four cells of Table 3.

    python results/celeba/linear.py --json results/celeba/linear.json          # CelebA in data/celeba, half an hour

Linear: with mu and C the mean and covariance of the training images' 3,072 numbers and S those of the given pixels, an image
y is completed as mu + C[:, S] (C[S, S] + ridge I)^-1 (y_S - mu_S), the linear rule of least squared error for these very
places. It is given C, which a meta-learner has to find in its weights, and knows nothing that is not linear.

Additive: the best rule that adds up one linear term per given pixel, whichever the others are: mu + sum_i K[:, i] (y_i - mu_i),
one K for all sets of k random pixels. One plain gradient step on the last layer of a network of pixels is such a rule.

Mixture: the same in each of K Gaussians, weighted by how likely each makes the given pixels, which is the best completion
if images were drawn from the mixture, and not linear. It is fitted by EM to the leading principal components; what lies
outside them keeps its overall covariance. Only the cells of 10 pixels: 100 would take hours. Pixels and test images are those
of train_celeba.py's evaluation. `--parts` measures some of it anew and leaves the rest of the file as it is.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_celeba  # noqa: E402
from common import describe_machine, mean_ci95, progress_over  # noqa: E402

PARTS = ("linear", "sizes", "additive", "mixture")
CELLS = [("random", 10), ("random", 100), ("ordered", 10), ("ordered", 100)]


class Mixture(NamedTuple):
    """K Gaussians over the n numbers of an image, in float64."""
    shares: torch.Tensor            # (K,), sum 1
    means: torch.Tensor             # (K, n)
    covariances: torch.Tensor       # (K, n, n)


def one_gaussian(train: torch.Tensor) -> Mixture:
    """Mean and covariance of the images (I, n)."""
    mean = train.mean(0)
    covariance = (train - mean).T @ (train - mean) / len(train)
    return Mixture(torch.ones(1).double(), mean[None].double(), covariance[None].double())


def additive_rule(model: Mixture, k: int, ridge: float) -> torch.Tensor:
    """K (n, n): with x the centred image in which all but k of the n / 3 pixels, drawn at random, are 0, E[y x^T] E[x x^T]^-1."""
    covariance = model.covariances[0]
    pixels = len(covariance) // 3
    one, two = k / pixels, k * (k - 1) / (pixels * (pixels - 1))        # chances that a pixel is given, and another as well
    same = torch.kron(torch.eye(pixels), torch.ones(3, 3)).bool()
    given = torch.where(same, one, two) * covariance + one * ridge * torch.eye(len(covariance)).double()
    return torch.linalg.solve(given, one * covariance).T


def additive_errors(model: Mixture, test: torch.Tensor, given: torch.Tensor, ridge: float) -> list[float]:
    """Mean squared error of each image completed by the additive rule: test (T, P, 3), given (T, k) pixel numbers."""
    mask = torch.zeros(test.shape[:2]).scatter_(1, given, 1.0).unsqueeze(2)
    centred = test - model.means[0].float().view(-1, 3)
    completed = (centred * mask).flatten(1) @ additive_rule(model, given.shape[1], ridge).T.float()
    return (completed - centred.flatten(1)).square().mean(1).tolist()


def fit_mixture(train: torch.Tensor, components: int, dims: int, rounds: int, prior: float = 200.0) -> Mixture:
    """EM on the images (I, n) in their `dims` leading principal components, from k-means on the first 20.

    A component's covariance is drawn towards 0.3 of the overall variances, with the weight of `prior` images."""
    whole = one_gaussian(train)
    variances, axes = torch.linalg.eigh(whole.covariances[0])
    variances, axes = variances[-dims:].float(), axes[:, -dims:].float()
    z = (train - whole.means[0].float()) @ axes                                                   # (I, dims)
    share = nn.functional.one_hot(k_means(z[:, -20:], components), components).float()           # (I, K)
    for _ in progress_over(rounds, f"EM, {components} components"):
        size = share.sum(0)
        means = share.T @ z / size[:, None]
        centred = [(z - mean) * s.sqrt()[:, None] for mean, s in zip(means, share.T)]
        covariances = torch.stack([(c.T @ c + prior * 0.3 * variances.diag()) / (n + prior) for c, n in zip(centred, size)])
        factors = torch.linalg.cholesky(covariances)
        white = [torch.linalg.solve_triangular(f, (z - mean).T, upper=False) for f, mean in zip(factors, means)]
        log = torch.stack([-w.square().sum(0) / 2 - f.diagonal().log().sum() for w, f in zip(white, factors)], 1)
        share = (log + (size / len(z)).log()).softmax(1)
    outside = whole.covariances[0] - (axes * variances @ axes.T).double()
    return Mixture((size / len(z)).double(), whole.means + (means @ axes.T).double(),
                   torch.stack([(axes @ c @ axes.T).double() + outside for c in covariances]))


def k_means(z: torch.Tensor, count: int, rounds: int = 20) -> torch.Tensor:
    """The cluster of each row."""
    centres = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(rounds):
        nearest = torch.cdist(z, centres).argmin(1)
        centres = torch.stack([z[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(count)])
    return nearest


def completion_errors(model: Mixture, test: torch.Tensor, given: torch.Tensor, ridge: float, what: str) -> list[float]:
    """Mean squared error of each completed image: test (T, P, 3), given (T, k) pixel numbers."""
    errors = []
    for t in progress_over(len(test), what):
        image, known = test[t].flatten().double(), (given[t].unsqueeze(1) * 3 + torch.arange(3)).flatten()
        rows = model.covariances[:, known]                                                        # (K, |S|, n)
        factor = torch.linalg.cholesky(rows[:, :, known] + ridge * torch.eye(len(known), dtype=torch.float64))
        off = (image[known] - model.means[:, known]).unsqueeze(2)
        solved = torch.cholesky_solve(off, factor)                                                # (K, |S|, 1)
        log = -(off * solved).sum((1, 2)) / 2 - factor.diagonal(dim1=1, dim2=2).log().sum(1) + model.shares.log()
        completed = log.softmax(0) @ (model.means + (solved.mT @ rows).squeeze(1))
        errors.append((completed - image).square().mean().item())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/celeba", help="folder with CelebA")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="the linear rule in all cells, the same from fewer training images, the additive rule, the mixture")
    parser.add_argument("--ridge", type=float, default=1e-4, help="added to the variances (colours are in [0, 1])")
    parser.add_argument("--components", type=int, default=12, help="K, Gaussians of the mixture")
    parser.add_argument("--dims", type=int, default=200, help="principal components in which they are fitted")
    parser.add_argument("--rounds", type=int, default=40, help="of EM")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    splits = {name: torch.from_numpy(images.copy()) for name, images in train_celeba.load_splits(args.data).items()}
    train, test = train_celeba.colours(splits["train"]).flatten(1), train_celeba.colours(splits["test"])

    def cell(order: str, k: int, what: str, errors) -> dict:
        given = train_celeba.sample_pixels(len(test), k, order, torch.Generator().manual_seed(train_celeba.EVALUATION_SEED))
        value, ci95 = mean_ci95(errors(test, given))
        print(f"{what}, {order} {k}: {value:.4f} ± {ci95:.4f} over {len(test)} test images", flush=True)
        return {"value": value, "ci95": ci95}

    def best(model: Mixture, order: str, k: int, what: str) -> dict:
        errors = lambda test, given: completion_errors(model, test, given, args.ridge, f"{what}, {order} {k}")
        return cell(order, k, what, errors)

    figures = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    figures |= {"command": "python results/celeba/linear.py --json results/celeba/linear.json", "ridge": args.ridge,
                "training_images": len(train), "test_images": len(test), **describe_machine(torch.device("cpu"))}
    if "linear" in args.parts:
        value, ci95 = mean_ci95((test.flatten(1) - train.mean(0)).square().mean(1).tolist())
        figures["mse"] = {"mean image": {"value": value, "ci95": ci95}} | {
            f"{order} {k}": best(one_gaussian(train), order, k, "linear") for order, k in CELLS}
    if "sizes" in args.parts:
        figures["random_10_by_training_images"] = {
            n: best(one_gaussian(train[:n]), "random", 10, f"linear, {n} training images") for n in (1_500, 3_000, 6_000)}
    if "additive" in args.parts:
        errors = lambda test, given: additive_errors(one_gaussian(train), test, given, args.ridge)
        figures["additive"] = {f"{order} {k}": cell(order, k, "additive", errors) for order, k in CELLS if order == "random"}
    if "mixture" in args.parts:
        mixture = fit_mixture(train, args.components, args.dims, args.rounds)
        figures["mixture"] = {"components": args.components, "dims": args.dims, "rounds": args.rounds, "mse": {
            f"{order} {k}": best(mixture, order, k, f"mixture of {args.components}") for order, k in CELLS if k == 10}}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
