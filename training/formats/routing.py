"""What the routers of StyleInject did, as numbers for files and logs, and in words."""

from collections.abc import Mapping
from typing import Any

from ..adapters.routing import Routing

ONE_SIDED = 0.9  # share of one branch from which on the others hardly matter


def routing_table(routings: Mapping[str, Routing]) -> dict[str, Any]:
    """The routings of layers by name, for JSON: means over the layers, and each layer's shares."""
    if not routings:
        return {}
    found = list(routings.values())
    return {
        "entropy": round(sum(each.entropy for each in found) / len(found), 4),
        "spread": round(sum(each.spread for each in found) / len(found), 4),
        "largest": round(sum(max(each.shares) for each in found) / len(found), 4),
        "one_sided": sum(len(each.shares) > 1 and max(each.shares) > ONE_SIDED for each in found),
        "layers": {name: [round(share, 3) for share in each.shares] for name, each in routings.items()},
    }


def summary_of(table: Mapping[str, Any]) -> dict[str, float]:
    """The means over the layers alone."""
    return {name: value for name, value in table.items() if name != "layers"}


def routing_in_words(table: Mapping[str, Any]) -> str:
    """One line for people."""
    layers = table["layers"]
    branches = len(next(iter(layers.values())))
    if branches == 1:
        return "one branch, and so no routing"
    text = (
        f"routing over {branches} branches: the most used has {table['largest']:.0%} of a layer on average "
        f"({1 / branches:.0%} = even), entropy {table['entropy']:.2f} of 1, of which instances decide "
        f"{table['spread']:.2g}"
    )
    if table["one_sided"]:
        text += f"; in {table['one_sided']} of {len(layers)} layers one branch has over {ONE_SIDED:.0%}"
    return text
