"""The methods by name: how each is built, and the settings that its search tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.methods.heads import FedClip, LinearProbe, PromptFL, TipAdapter, TipAdapterF
from bench.methods.method import Method
from bench.methods.sigma import Sigma, ZeroShot
from bench.methods.weights import FullTuning, LayerNorms, Lora, LoraProducts
from fedsigma.common.backbones import Backbone
from fedsigma.common.config.study import StudyConfig

Setting = dict[str, Any]
"""A learning rate, a strategy's options, or arguments of the method."""
Build = Callable[[Backbone, StudyConfig, Setting], Method]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row of the comparison.

    Attributes:
        title: Title in tables.
        build: Builds the method on a new backbone.
        rates: Learning rates that the search starts with, in equal ratios; it is extended beyond a best end.
        others: Settings that are tried with each rate.
        after: Name of a candidate whose chosen setting this one starts from.
        strategy: Strategy in place of the study's.
        quick: Whether the image tower is frozen and its features are cached, so that a search costs little.
        search_everywhere: Whether settings depend on a study's features, and are searched in every study.
    """

    title: str
    build: Build
    rates: Sequence[float] = ()
    others: Sequence[Setting] = ({},)
    after: str = ""
    strategy: str = ""
    quick: bool = False
    search_everywhere: bool = False


def with_setting(study: StudyConfig, candidate: Candidate, setting: Mapping[str, Any]) -> StudyConfig:
    """Return the study under a candidate's setting and strategy."""
    federation = study.federation
    if candidate.strategy:
        options = dict(setting.get("options", {}))
        federation = replace(federation, strategy=candidate.strategy, options=options)
    training = study.training
    if rate := setting.get("learning_rate"):
        # Keeps the form of the schedule: a rate near the study's last one would hardly fall, or rise.
        last = training.final_learning_rate * rate / training.learning_rate
        training = replace(training, learning_rate=rate, final_learning_rate=last)
    return replace(study, federation=federation, training=training)


def _sigma(codec: str = "exact") -> Build:
    return lambda backbone, study, setting: Sigma(backbone, study, codec)


def _cache(kind: type[TipAdapterF]) -> Build:
    return lambda backbone, study, setting: kind(
        backbone, study.prompts, alpha=setting["alpha"], beta=setting["beta"]
    )


def _strategy(name: str, *options: Setting, rates: Sequence[float] = (), after: str = "fedavg") -> Candidate:
    """Return sigma under another strategy, at the rate of `fedavg`: most have no step of their own either."""
    return Candidate(
        title=f"sigma, {name}",
        build=_sigma(),
        strategy=name,
        rates=rates,
        others=tuple({"options": setting} for setting in options) or ({},),
        after=after,
    )


_CACHES = tuple(
    {"alpha": alpha, "beta": beta}
    for alpha in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    for beta in (1.0, 5.5, 20.0, 60.0)
)

_ETAS: tuple[Setting, ...] = ({"eta": 0.01}, {"eta": 0.03}, {"eta": 0.1}, {"eta": 0.3})

CANDIDATES: dict[str, Candidate] = {
    "zero-shot": Candidate(title="zero-shot", build=lambda backbone, study, _: ZeroShot(backbone, study)),
    "sigma": Candidate(title="sigma", build=_sigma(), rates=(2e-2, 4e-2, 8e-2)),
    "sigma-small": Candidate(title="sigma, codec small", build=_sigma("small"), after="sigma"),
    "full": Candidate(
        title="full fine-tuning",
        build=lambda backbone, study, _: FullTuning(backbone, study.prompts),
        rates=(3e-5, 1e-4, 3e-4),
    ),
    "lora": Candidate(
        title="CLIP-LoRA r = 2, mean of factors",
        build=lambda backbone, study, _: Lora(backbone, study.prompts, seed=study.seed),
        rates=(1e-3, 3e-3),
    ),
    "lora-products": Candidate(
        title="CLIP-LoRA r = 2, mean of products",
        build=lambda backbone, study, _: LoraProducts(backbone, study.prompts, seed=study.seed),
        after="lora",
    ),
    "layer-norms": Candidate(
        title="layer norms",
        build=lambda backbone, study, _: LayerNorms(backbone, study.prompts),
        rates=(3e-3, 9e-3),
    ),
    "promptfl": Candidate(
        title="PromptFL, 16 tokens",
        build=lambda backbone, study, _: PromptFL(backbone, study.classes, seed=study.seed),
        rates=(3e-3, 9e-3, 2.7e-2),
        quick=True,
    ),
    "fedclip": Candidate(
        title="FedCLIP's adapter",
        build=lambda backbone, study, _: FedClip(backbone, study.prompts, seed=study.seed),
        rates=(3e-3, 9e-3, 2.7e-2),
        quick=True,
    ),
    "probe": Candidate(
        title="linear probe",
        build=lambda backbone, study, _: LinearProbe(backbone, study.prompts),
        rates=(3e-3, 9e-3, 2.7e-2),
        quick=True,
    ),
    "tip": Candidate(
        title="Tip-Adapter", build=_cache(TipAdapter), others=_CACHES, quick=True, search_everywhere=True
    ),
    "tip-f": Candidate(
        title="Tip-Adapter-F",
        build=_cache(TipAdapterF),
        rates=(1e-5, 1e-4, 1e-3),
        after="tip",
        quick=True,
        search_everywhere=True,
    ),
    "fedavg": _strategy("fedavg", rates=(4e-2, 8e-2), after=""),
    "fedprox": _strategy("fedprox", {"proximal_mu": 0.01}, {"proximal_mu": 0.1}),
    "fedadam": _strategy("fedadam", *_ETAS, after="sigma"),
    "fedyogi": _strategy("fedyogi", *_ETAS, after="sigma"),
    "fedmedian": _strategy("fedmedian"),
    "fedtrimmedavg": _strategy("fedtrimmedavg", {"beta": 0.25}),
    "krum": _strategy("krum", {"num_malicious_nodes": 1}),
    "multikrum": _strategy("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}),
    "qfedavg": _strategy(
        "qfedavg",
        {"q": 0.1},
        {"q": 0.1, "client_learning_rate": 1.0},
        {"q": 0.1, "client_learning_rate": 10.0},
    ),
}
