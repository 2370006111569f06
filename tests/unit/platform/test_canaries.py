"""Whose turn a request is where a model has a canary, and what is counted of whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

from quire.router.canaries import Canaries
from quire.router.fleet import ServedModel
from quire_schemas import wire
from quire_schemas.workers import Fared


@dataclass
class Served:
    """What `Canaries` looks at of a `ServedModel`, whose replicas are not at issue here."""

    route: wire.ModelRoute
    has_place: bool = True

    @property
    def name(self) -> str:
        return self.route.canary_of or self.route.model


def route(model: str, canary_of: str = "", percent: int = 0, template: str = "t") -> wire.ModelRoute:
    return wire.ModelRoute(
        model, (), 1, template, "/t", None, 9, 9, 9, 9.0, 0, (), canary_of=canary_of, percent=percent
    )


def table(*served: Served) -> dict[str, ServedModel]:
    return {each.route.model: cast(ServedModel, each) for each in served}


def turns(canaries: Canaries, served: ServedModel, count: int) -> Counter[str]:
    return Counter(canaries.turn(served).route.model for _ in range(count))


def test_the_share_is_exact_and_the_stable_revision_has_what_the_canary_cannot_take() -> None:
    canaries, new = Canaries(), Served(route("m~", "m", 5))
    models = table(Served(route("m")), new, Served(route("other")))
    canaries.set(models)
    assert turns(canaries, models["m"], 200) == {"m": 190, "m~": 10}
    assert turns(canaries, models["other"], 9) == {"other": 9}
    new.has_place = False
    assert turns(canaries, models["m"], 50) == {"m": 50}
    new.has_place = True
    assert turns(canaries, models["m"], 100) == {"m": 95, "m~": 5}, "what it missed it does not catch up with"
    new.route = route("m~", "m", 100)
    canaries.set(models)
    assert turns(canaries, models["m"], 7) == {"m~": 7}
    new.route = route("m~", "m", 0)
    canaries.set(models)
    assert turns(canaries, models["m"], 7) == {"m": 7}
    canaries.set(table(new))
    assert canaries.told() == {}, "a canary of nothing"


def test_both_are_counted_from_the_same_moment_and_anew_for_another_canary() -> None:
    canaries, new = Canaries(), Served(route("m~", "m", 5))
    models = table(Served(route("m")), new, Served(route("other")))
    canaries.set(table(Served(route("m"))))
    assert not canaries.compares(models["m"])
    canaries.note("m", Fared("whole"))
    canaries.set(models)
    assert [canaries.compares(each) for each in models.values()] == [True, True, False]
    canaries.note("other", Fared("failed"))
    canaries.note("m", Fared("whole", first_token=0.5))
    canaries.note("m~", Fared("whole", void=True))
    canaries.note("m~", Fared("failed", void=True, between_tokens=0.02))
    canaries.note("m~", Fared("left", first_token=0.5))
    new.route = route("m~", "m", 60)
    canaries.set(models)
    told, half = canaries.told()["m"], wire.time_bucket(0.5)
    assert told.stable == wire.Measured(1, 0, 1, 0, {half: 1}, {})
    assert told.new == wire.Measured(2, 1, 1, 1, {half: 1}, {wire.time_bucket(0.02): 1})
    new.route = route("m~", "m", 60, "t2")
    canaries.set(models)
    assert canaries.told()["m"] == wire.Comparison("t2", wire.Measured(), wire.Measured())
