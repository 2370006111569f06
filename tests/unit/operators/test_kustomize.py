"""Which kustomizations could lead to the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire_operators.git import Refused
from quire_operators.kustomize import in_repository, refuse_addresses

INLINE = """\
resources: [base.yaml]
commonAnnotations: {docs: 'https://example.org/runbook'}
configMapGenerator: [{name: c, literals: ['url=http://127.0.0.1:1']}]
patches:
- target: {kind: Model}
  patch: |-
    - {op: replace, path: /spec/source, value: 'hf://a/b'}
"""


def test_an_address_in_the_text_of_a_patch_is_no_place_to_load_from() -> None:
    refuse_addresses("kustomization.yaml", INLINE.encode())


@pytest.mark.parametrize(
    "text",
    [
        "resources: ['https://example.org/x']",
        "components: [github.com/a/b]",
        "bases: ['git::x']",
        "patches: [{path: 'http://127.0.0.1:1/x.yaml', patch: ''}]",
        "patchesStrategicMerge: ['http://127.0.0.1:1/x.yaml']",
        "configMapGenerator: [{name: c, files: ['http://127.0.0.1:1/x']}]",
        "replacements: [{path: 'http://127.0.0.1:1/x'}]",
    ],
)
def test_an_address_anywhere_else_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"kustomization.yaml:1:\d+: '.*' is refused: it names an address"):
        refuse_addresses("kustomization.yaml", text.encode())


def test_paths_are_those_in_the_repository_also_behind_a_link_below_its_own_name(tmp_path: Path) -> None:
    """The end of the one path is the other."""
    real = tmp_path / "data" / tmp_path.relative_to("/") / "home"
    (real / "tree").mkdir(parents=True)
    (tmp_path / "home").symlink_to(real)
    tree = tmp_path / "home" / "tree"
    said = f"{real}/tree/over/a.yaml in {real}/tree; {tree}/over/a.yaml in {tree}"
    assert in_repository(said, tree) == "over/a.yaml in .; over/a.yaml in ."
