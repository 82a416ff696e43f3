"""How good samples are as a whole: recognised, near the data, varied, and not copied.

Pictures and sound are judged by a classifier trained on real data (``genssm.classifier``): its
classes, and its features in the place of Inception's. Text is judged by what it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from genssm.classifier import Classifier, load_classifier
from genssm.codec import Audio, Codec, Image
from genssm.data import Example
from genssm.pipeline import Pipeline
from genssm.request import Settings
from genssm.session import Sample
from genssm.sources import comes_in_splits, open_split, read_examples

COPIED = 40  # characters in a row that are also in the training text count as copied
_REAL = 5_000  # real pictures or sounds that are looked at


@dataclass(frozen=True)
class Judged:
    """Features (n, F), probabilities (n, classes) and the class of each, -1 where unknown."""

    features: Tensor
    probabilities: Tensor
    labels: Tensor

    @property
    def recognised(self) -> Tensor:
        """Whether the likeliest class is the right one, of those whose class is known, bool."""
        known = self.labels >= 0
        return (self.probabilities.argmax(-1) == self.labels)[known]


def judge(classifier: Classifier, examples: Sequence[Example]) -> Judged:
    """Let a classifier look at examples."""
    features, probabilities = classifier.judge([e.raw for e in examples])
    names = [classifier.codec.class_of(e.label) for e in examples]
    labels = [-1 if name is None else classifier.classes.index(name) for name in names]
    return Judged(features, probabilities, torch.tensor(labels))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of features (n, F).

    With Inception's features this is FID (arXiv 1706.08500); values by other features compare only
    with each other. It needs more samples than features to mean much.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.cov(x.T, correction=0).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(gap + cov_a.trace() + cov_b.trace() - 2 * cross))


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL divergence of each p(class) (n, classes) from their mean: 1 … classes.

    Source: arXiv 1606.03498, Section 4.
    """
    p = probabilities.double().clamp(min=1e-12)
    return float((p * (p.log() - p.mean(0, keepdim=True).log())).sum(-1).mean().exp())


def nearest(samples: Tensor, data: Tensor) -> Tensor:
    """The distance of each of (n, F) to the nearest of (m, F), (n,).

    By products of matrices an example may be 0.04 from itself: they say which few are the nearest.
    """
    few = torch.cdist(samples, data).topk(min(8, len(data)), largest=False).indices
    return (samples[:, None] - data[few]).norm(dim=-1).amin(-1)


def diversity(judged: Judged) -> float:
    """Mean distance of two different examples of one class."""
    distances = []
    for label in judged.labels.unique():
        own = judged.features[judged.labels == label]
        if len(own) > 1:
            distances.append(torch.pdist(own).mean())
    return float(torch.stack(distances).mean()) if distances else 0.0


def draw(
    pipe: Pipeline, count: int, settings: Settings, note: Callable[[str], None] = lambda text: None
) -> list[Sample]:
    """``count`` samples, every class equally often.

    No two have an index in common, so that all are drawn with different random numbers.
    """
    classes = pipe.codec.classes or (None,)
    samples: list[Sample] = []
    for i, label in enumerate(classes):
        n = count // len(classes) + (i < count % len(classes))
        if n:
            own: Settings = {**settings, "count": n, "first": len(samples), "label": label}
            samples += pipe.sample(**own)
            note(f"{len(samples)} of {count} samples drawn")
    return samples


def measure(
    samples: Sequence[Example],
    classifier: Classifier,
    train: Sequence[Example],
    held_out: Sequence[Example],
) -> dict[str, object]:
    """Figures of pictures or sounds, each beside that of real held-out data where there is any.

    "recognised": share in which the classifier hears or sees the class that was asked for;
    "frechet": distance from the training data; "copies": share of the samples that are nearer to a
    training example than 99 of 100 held-out examples are.
    """
    made, real = judge(classifier, samples), judge(classifier, train)
    facts: dict[str, object] = {"samples": len(samples), **_figures(made, real)}
    if any(made.labels >= 0):
        right = made.probabilities.argmax(-1) == made.labels
        facts["recognised by class"] = {
            name: round(float(right[made.labels == i].double().mean()), 3)
            for i, name in enumerate(classifier.classes)
            if bool((made.labels == i).any())
        }
    if held_out:
        unseen = judge(classifier, held_out)
        usual = nearest(unseen.features, real.features)
        near = nearest(made.features, real.features) < usual.quantile(0.01)
        facts["copies"] = round(float(near.double().mean()), 4)
        facts["held out"] = {"samples": len(held_out), **_figures(unseen, real)}
    return facts


def _figures(judged: Judged, real: Judged) -> dict[str, object]:
    recognised = judged.recognised.double()
    return {
        "recognised": round(float(recognised.mean()), 4) if len(recognised) else None,
        "frechet": round(frechet_distance(judged.features, real.features), 3),
        "inception": round(inception_score(judged.probabilities), 3),
        "diversity": round(diversity(judged), 3),
        "nearest": round(float(nearest(judged.features, real.features).median()), 3),
    }


def measure_text(
    samples: Sequence[str], train: Sequence[str], held_out: Sequence[str]
) -> dict[str, object]:
    """Figures of texts, each beside that of as many pieces of real held-out text of their length.

    "distinct": different runs of four words over all; "copied": share of the text that is in the
    training text word for word, in runs of about ``COPIED`` characters and more.
    """
    known = {hash(t[i : i + COPIED]) for t in train for i in range(0, len(t) - COPIED + 1, COPIED)}
    length = max([1, *map(len, samples)])
    facts: dict[str, object] = {"samples": len(samples), **_text_figures(samples, known)}
    if held_out:
        pieces = [t[i : i + length] for t in held_out for i in range(0, len(t), length)]
        count = min(len(pieces), len(samples))
        cut = [pieces[i * len(pieces) // count] for i in range(count)]
        facts["held out"] = {"samples": len(cut), **_text_figures(cut, known)}
    return facts


def _text_figures(texts: Sequence[str], known: set[int]) -> dict[str, object]:
    """``known``: the training text in consecutive blocks, of which a copied run holds one in 40."""
    split = [text.split() for text in texts]
    runs = [tuple(words[i : i + 4]) for words in split for i in range(len(words) - 3)]
    windows = [hash(t[i : i + COPIED]) for t in texts for i in range(len(t) - COPIED + 1)]
    copied = COPIED * sum(window in known for window in windows)
    return {
        "distinct": round(len(set(runs)) / max(1, len(runs)), 4),
        "copied": round(min(1.0, copied / max(1, len(windows))), 4),
    }


def evaluate_samples(
    pipe: Pipeline,
    data: Path,
    count: int,
    settings: Settings,
    classifier: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, object]:
    """Draw ``count`` samples and hold them against ``data``.

    ``data``: a folder or public set with train and validation data, or training data alone.
    ``settings``: of ``Pipeline.sample``. Raises ValueError for a classifier that is missing or of
    other data.
    """
    facts: dict[str, object] = {"settings": dict(settings)}
    if pipe.modality == "text":
        train, held_out = _reference(data, pipe.codec)
        samples = draw(pipe, count, settings, note)
        texts = [[e.raw for e in part] for part in (train, held_out)]
        return facts | measure_text([s.raw for s in samples], *texts)
    if classifier is None:
        raise ValueError(
            f"samples of {pipe.modality} are judged by a classifier; train one with "
            "genssm classifier and give its file"
        )
    judging, report = load_classifier(classifier)
    if not _fits(judging.codec, pipe.codec):
        raise ValueError(f"the classifier {str(classifier)!r} is for other data than this model")
    train, held_out = _reference(data, pipe.codec)
    samples = draw(pipe, count, settings, note)
    examples = [Example(s.raw, pipe.codec.label_of(s.plan.tokens[0])) for s in samples]
    facts |= measure(examples, judging, train, held_out)
    if pipe.codec.classes:
        facts = {"value": facts["recognised"], "unit": "recognised", **facts}
    return facts | {"classifier accuracy": round(report.accuracy, 4)}


def _reference(data: Path, codec: Codec) -> tuple[list[Example], list[Example]]:
    """At most ``_REAL`` training and held-out examples, spread over the whole (all of text)."""
    if comes_in_splits(data):
        splits = [open_split(data, name, codec.modality) for name in ("train", "validation")]
        parts = [list(split.examples(codec)) for split in splits]
    else:
        parts = [list(read_examples(data, codec))]
    if codec.modality != "text":
        parts = [part[:: -(-len(part) // _REAL)] for part in parts]
    return parts[0], parts[1] if len(parts) > 1 else []


def _fits(judging: Codec, codec: Codec) -> bool:
    if isinstance(judging, Audio) and isinstance(codec, Audio):
        return judging.rate == codec.rate
    return isinstance(judging, Image) and isinstance(codec, Image) and judging.shape == codec.shape


def classification_accuracy(
    pipe: Pipeline, examples: Iterable[Example], limit: int | None = None
) -> dict[str, object]:
    """How often the class of greatest likelihood is the right one, "value" of "examples"."""
    right = total = 0
    for example in islice(examples, limit):
        label = pipe.codec.class_of(example.label)
        if label is not None:
            p = pipe.classify(example.raw)
            right, total = right + (max(p, key=p.__getitem__) == label), total + 1
    if not total:
        raise ValueError("no example has a class that the model knows")
    return {"value": right / total, "unit": "accuracy", "examples": total}
