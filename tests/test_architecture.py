"""No module imports itself by a detour. `lint-imports` holds the layers; this holds single modules, whatever package."""

from __future__ import annotations

import graphlib

import pytest

grimp = pytest.importorskip("grimp", reason="the import graph needs import-linter of the dev extra")


def test_no_circle_between_modules() -> None:
    graph = grimp.build_graph("mindomni_rt", "mindomni_rt.kernels", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 150 and imports["mindomni_rt.kernels.swiglu"]
    circles = []
    while True:  # each circle found is cut at its last import, so that one run names them all
        try:
            graphlib.TopologicalSorter(imports).prepare()
            break
        except graphlib.CycleError as error:
            importing, *_, last, first = list(reversed(error.args[1]))
            circles.append(" -> ".join(reversed(error.args[1])))
            imports[last] = imports[last] - {first}
    assert not circles
