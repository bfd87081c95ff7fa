"""The scores: the Frechet distance and the kernel distance of two sets of features, and the alignment with captions."""

import numpy as np

from train.evaluation.chunked_array import ChunkedArray
from train.evaluation.scene_alignment import alignment

# Of the second stage, in pixels: a drawn picture against the true one, and, shrunk again, against the small one.
OF_PAIRS = ("psnr", "consistency")
# The features that each score is computed on; the others read the pixels.
FEATURES = {"fid": "inception", "fd_lite0": "lite0", "kid_lite0": "lite0", "alignment": ""} | dict.fromkeys(
    OF_PAIRS, ""
)
# Features per picture.
DIM = {"inception": 2048, "lite0": 1280}
# Of the kernel distance: random subsets, and pictures in each.
SUBSETS, SUBSET_SIZE = 100, 1000
# The mean squared error of rounding to 8 bits, below which no error counts: a flat picture may be met exactly.
ROUNDING = 1 / 12


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two Gaussians with the features' means and covariances A and B.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2)

    Shapes: a [N, D], b [M, D], N and M more than D.
    Raises: ValueError if the features don't fit each other, are not finite, or are too few for the covariance.
    Source: Dowson & Landau 1982; Heusel et al. 2017, equation 6.
    """
    _check(a, b)
    for features in (a, b):
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"{len(features)} pictures for {features.shape[1]} features: their covariance has no full rank, so "
                f"their Frechet distance is not comparable; take samples={features.shape[1] + 1} or more"
            )
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # A B has the eigenvalues of A^1/2 B A^1/2, which is symmetric: they are real, and negative only by rounding.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The unbiased squared MMD under the kernel (x.y / D + 1)^3: its mean and deviation over random subsets.

    Shapes: a [N, D], b [M, D]; subsets of 1,000, or of the smaller of N and M if that is less.
    Raises: ValueError if the features don't fit each other or are not finite.
    Source: Binkowski et al. 2018, section 4.
    """
    _check(a, b)
    rng, size = np.random.default_rng(seed), min(len(a), len(b), SUBSET_SIZE)
    distances = []
    for _ in range(SUBSETS):
        x, y = (v[rng.choice(len(v), size, replace=False)].astype(np.float64) for v in (a, b))
        within = _off_diagonal_mean(_kernel(x, x)) + _off_diagonal_mean(_kernel(y, y))
        distances.append(within - 2 * _kernel(x, y).mean())
    return float(np.mean(distances)), float(np.std(distances))


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of each picture in dB, 10 log10(255^2 / mse); at most 58.92.

    Shapes: a, b uint8 [N, 3, H, W], all of whose values count -> [N].
    Source: Huynh-Thu & Ghanbari 2008, equation 1.
    """
    mse = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    return 10 * np.log10(255**2 / mse.clip(min=ROUNDING))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # takes a tenth of the time of ** 3


def _off_diagonal_mean(kernel: np.ndarray) -> float:
    return float((kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)))


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {list(a.shape)} and {list(b.shape)}: give [N, D] and [M, D] of one extractor")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} pictures: a distance needs two or more of each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("some features are not finite: the extractor's weights, or the pictures, are damaged")


def score(
    scores: list[str], features: dict[str, np.ndarray], references: dict[str, np.ndarray], images: ChunkedArray,
    captions: list[str],
) -> dict[str, float]:  # fmt: skip
    """The scores of the drawn images by name, with NAME_std and alignment_chance beside them.

    features, references: of the drawn images and of the captions' own pictures, by the extractor's name; of OF_PAIRS
    the features are a number for each image, by the score's name.
    """
    line: dict[str, float] = {}
    for name in scores:
        kind = FEATURES[name]
        if name == "alignment":
            line |= align(images.read(), captions)
        elif name in OF_PAIRS:
            line[name] = float(features[name].mean())
        elif name == "kid_lite0":
            line[name], deviation = kernel_distance(features[kind], references[kind])
            if len(references[kind]) > SUBSET_SIZE:  # of fewer pictures every subset is the same
                line[f"{name}_std"] = deviation
        else:
            line[name] = frechet_distance(features[kind], references[kind])
    return line


def align(images: np.ndarray, captions: list[str]) -> dict[str, float]:
    """The mean alignment of pictures with their captions, the share that is exact, and the mean with others' captions.

    images: uint8 [N, 3, H, W].
    """
    own = [alignment(image.transpose(1, 2, 0), caption) for image, caption in zip(images, captions, strict=True)]
    others = captions[1:] + captions[:1]
    chance = [alignment(image.transpose(1, 2, 0), caption) for image, caption in zip(images, others, strict=True)]
    return {
        "alignment": float(np.mean([a.score for a in own])),
        "alignment_exact": float(np.mean([a.exact for a in own])),
        "alignment_chance": float(np.mean([a.score for a in chance])),
    }
