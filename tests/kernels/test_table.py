from engine.kernels.op import use_backend
from engine.kernels.table import rows

OPS = {
    "adamw",
    "attention",
    "embedding",
    "linear",
    "rms_norm",
    "sample_token",
    "shard_logprob",
    "swiglu",
    "token_logprob",
}


def test_every_op_is_listed_with_one_chosen_backend():
    table = rows()
    assert {row.op for row in table} >= OPS
    for op in OPS:
        assert sum(row.chosen for row in table if row.op == op) == 1


def test_every_backend_that_is_not_chosen_says_why():
    for row in rows():
        assert bool(row.why_not) != row.chosen, row


def test_a_forced_backend_is_the_chosen_one():
    with use_backend("torch"):
        assert {row.backend for row in rows() if row.chosen} == {"torch"}
        assert all(row.why_not for row in rows() if row.backend == "cpu")
