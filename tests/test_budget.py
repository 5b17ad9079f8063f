"""A model of a given cost: the share is met, by the size asked for, or refused with what would come
near.
"""

import pytest

from ngc_jax.config import base, validate
from ngc_jax.runtime.errors import UserError
from ngc_jax.training import match_size as budget


def config(**fields):
    config = base()
    config.model.update(fields)
    return config


def dense_small():
    return config(rule="dense", prelude=4, core=0, coda=0)


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("dense_small:0.25", {}),
        ("dense_small:0.25", {"match_by": "p_inter"}),
        ("dense_small:0.3", {"rule": "broadcast", "p_intra": 0, "match_by": "p_inter"}),
        ("dense_small:0.33", {"rule": "dense", "prelude": 4, "core": 0, "coda": 0}),
        ("dense_small:0.3", {"kind": "bdh", "hidden": 1024}),
        ("dense_small:0.5:flops", {"match_by": "hidden"}),
        ("dense_small:0.3", {"kind": "recurrent", "prelude": 0, "core": 2, "coda": 0}),
    ],
)
def test_the_share_is_met_within_a_hundredth(match, fields):
    tried = config(match=match, **fields)
    untouched = {"width", "p_inter", "p_intra"} - {tried.model.match_by}
    before = {name: tried.model[name] for name in untouched}
    budget.resolve(tried)
    assert {name: tried.model[name] for name in untouched} == before
    if tried.model.kind == "decoder":
        validate(tried)
    _, share, *what = match.split(":")
    what = what[0] if what else "parameters"
    assert budget.cost(tried, what) == pytest.approx(
        float(share) * budget.cost(dense_small(), what), rel=0.01
    )


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("dense_small", "must be CONFIG:SHARE"),
        ("dense_small:much", "must be CONFIG:SHARE"),
        ("dense_small:-1", "must be CONFIG:SHARE"),
        ("dense_small:0.3:bytes", "must be CONFIG:SHARE"),
        ("nonesuch:0.3", "no config 'nonesuch' in .*dense_small"),
        (
            "ngc_tiny:0.0001",
            "no sizes come within 1% of 0.0001; width=8 with hidden=8 has .*match_by",
        ),
    ],
)
def test_what_cannot_be_met_is_refused_and_changes_nothing(match, message):
    tried = config(match=match)
    sizes = tried.model.to_dict()
    with pytest.raises(UserError, match=message):
        budget.resolve(tried)
    assert tried.model.to_dict() == sizes
