"""Sizes from a cost: the share is met by the size asked for, or refused with what comes near."""

import pytest

from ngc_jax.config import base, named
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.match_size import cost, prepare


def config(**fields):
    config = base()
    config.model.update(fields)
    if config.model.kind != "decoder":
        config.stability.every = 0
    return config


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
        # what is to be set need not fit before
        ("dense_small:0.25", {"width": 100, "hidden": 301, "groups": 8, "init_rank": 104}),
        ("dense_small:0.3", {"kind": "bdh", "hidden": 1001}),
    ],
)
def test_the_share_is_met_within_a_hundredth(match, fields):
    tried = config(match=match, **fields)
    untouched = {"width", "p_inter", "p_intra"} - {tried.model.match_by}
    before = {name: tried.model[name] for name in untouched}
    prepare(tried)
    assert {name: tried.model[name] for name in untouched} == before
    _, share, *what = match.split(":")
    what = what[0] if what else "parameters"
    assert cost(tried, what) == pytest.approx(
        float(share) * cost(named("dense_small"), what), rel=0.01
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": "dense_small"}, "must be CONFIG:SHARE"),
        ({"match": "dense_small:much"}, "must be CONFIG:SHARE"),
        ({"match": "dense_small:-1"}, "must be CONFIG:SHARE"),
        ({"match": "dense_small:0.3:bytes"}, "must be CONFIG:SHARE"),
        ({"match": "nonesuch:0.3"}, "no config 'nonesuch', but .*dense_small"),
        (
            {"match": "ngc_tiny:0.0001"},
            "no sizes come within 1% of 0.0001; width=8 with hidden=8 has .*match_by",
        ),
        (
            {"match": "dense_small:0.3", "kind": "bdh", "match_by": "p_inter"},
            "model.match_by='p_inter': must be one of 'width', 'hidden' where model.kind='bdh'",
        ),
        ({"match": "dense_small:0.3", "groups": 0}, "model.groups=0: must be 1 or more"),
        ({"match": "dense_small:0.3", "heads": 3}, "model.heads=3: must be a divisor"),
        (
            {"match": "dense_small:0.3", "match_by": "p_inter", "width": 100},
            "model.width=100: must be a multiple of model.groups=8, for instance 96",
        ),
    ],
)
def test_what_cannot_be_met_is_refused_and_changes_nothing(fields, message):
    tried = config(**fields)
    sizes = tried.model.to_dict()
    with pytest.raises(UserError, match=message):
        prepare(tried)
    assert tried.model.to_dict() == sizes


def test_a_config_is_checked_with_the_sizes_that_are_set():
    """A rank that the given sizes have, and those that are set have not."""
    tried = config(match="dense_small:0.05071", init_rank=128)
    with pytest.raises(UserError, match=r"model.init_rank=128: must be 0, or .* up to 24"):
        prepare(tried)
