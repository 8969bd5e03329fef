"""Corpus caption metrics: BLEU-1..4, ROUGE-L and CIDEr-D, as in the COCO caption evaluation.

Definitions: BLEU, Papineni et al. 2002 (closest reference length); ROUGE-L, Lin 2004 (beta 1.2); CIDEr-D,
Vedantam et al. 2015 (n-grams up to 4, sigma 6, document frequencies from the references). METEOR is left
out, because METEOR needs Java, WordNet and paraphrase tables.

COCO splits text by the Penn Treebank rules. This module approximates them: text is lower-cased, punctuation
is dropped, and clitics such as 's and n't are split off. On plain captions both give the same tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

MAX_NGRAM = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_MAXIMUM = 10.0
# The two constants of the COCO implementation: they keep empty captions and missing n-grams finite.
BLEU_TINY, BLEU_SMALL = 1e-15, 1e-9

Tokens = list[str]
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b|\w+(?:[-./,']\w+)*|[^\w\s.,;:?!'\"`()\[\]{}-]")


def tokenize(caption: str) -> Tokens:
    """Lower-cased tokens of a caption without punctuation: "The dog's ball." -> the, dog, 's, ball."""
    return _TOKEN.findall(_CLITIC.sub(r" \1", caption.lower().replace("’", "'")))


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1..4, ROUGE-L and CIDEr of a corpus, as fractions (CIDEr up to 10).

    Args:
        predictions: One caption per image.
        references: The reference captions of the same images, at least one per image.

    Raises:
        ValueError: If there are no images, the lengths differ or an image has no reference.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"predictions and references must be equally many, at least 1, got {len(predictions)} and "
            f"{len(references)}"
        )
    if not all(references):
        raise ValueError("every image must have a reference caption, got an image with none")
    candidates = [tokenize(prediction) for prediction in predictions]
    targets = [[tokenize(reference) for reference in several] for several in references]
    bleu = {f"BLEU-{n}": value for n, value in enumerate(_bleu(candidates, targets), start=1)}
    pairs = list(zip(candidates, targets, strict=True))
    rouge = sum(_rouge_l(candidate, several) for candidate, several in pairs) / len(pairs)
    return {**bleu, "ROUGE-L": rouge, "CIDEr": _cider(candidates, targets)}


def _ngrams(tokens: Tokens, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _bleu(candidates: list[Tokens], targets: list[list[Tokens]]) -> Iterator[float]:
    matched, guessed = [0] * MAX_NGRAM, [0] * MAX_NGRAM
    length = sum(map(len, candidates))
    target_length = 0
    for candidate, several in zip(candidates, targets, strict=True):
        target_length += min((abs(len(t) - len(candidate)), len(t)) for t in several)[1]
        for n in range(1, MAX_NGRAM + 1):
            counts = _ngrams(candidate, n)
            ceiling: Counter[tuple[str, ...]] = Counter()
            for target in several:
                ceiling |= _ngrams(target, n)
            matched[n - 1] += (counts & ceiling).total()
            guessed[n - 1] += counts.total()
    ratio = (length + BLEU_TINY) / (target_length + BLEU_SMALL)
    brevity = 1.0 if ratio >= 1 else math.exp(1 - 1 / ratio)
    product = 1.0
    for n in range(1, MAX_NGRAM + 1):
        product *= (matched[n - 1] + BLEU_TINY) / (guessed[n - 1] + BLEU_SMALL)
        yield product ** (1 / n) * brevity


def _rouge_l(candidate: Tokens, several: list[Tokens]) -> float:
    if not candidate:
        return 0.0
    common = [(_common_length(candidate, target), len(target)) for target in several if target]
    precision = max((length / len(candidate) for length, _ in common), default=0.0)
    recall = max((length / size for length, size in common), default=0.0)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_length(left: Tokens, right: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def _cider(candidates: list[Tokens], targets: list[list[Tokens]]) -> float:
    frequency: Counter[tuple[str, ...]] = Counter()
    for several in targets:
        frequency.update(
            {gram for target in several for n in range(MAX_NGRAM) for gram in _ngrams(target, n + 1)}
        )
    log_images = math.log(len(targets))

    def weigh(tokens: Tokens, n: int) -> dict[tuple[str, ...], float]:
        counts = _ngrams(tokens, n)
        return {g: count * (log_images - math.log(max(1, frequency[g]))) for g, count in counts.items()}

    total = 0.0
    for candidate, several in zip(candidates, targets, strict=True):
        for n in range(1, MAX_NGRAM + 1):
            weighed = weigh(candidate, n)
            for target in several:
                similarity = _clipped_cosine(weighed, weigh(target, n))
                # COCO measures lengths in bigrams.
                gap = max(0, len(candidate) - 1) - max(0, len(target) - 1)
                total += similarity * math.exp(-(gap**2) / (2 * CIDER_SIGMA**2)) / len(several)
    return CIDER_MAXIMUM * total / (MAX_NGRAM * len(candidates))


def _clipped_cosine(left: dict[tuple[str, ...], float], right: dict[tuple[str, ...], float]) -> float:
    product = sum(min(weight, right[gram]) * right[gram] for gram, weight in left.items() if gram in right)
    norms = math.sqrt(sum(w * w for w in left.values()) * sum(w * w for w in right.values()))
    return product / norms if norms else 0.0
