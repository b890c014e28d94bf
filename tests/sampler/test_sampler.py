"""What a caller of generate and stream sees."""

import functools

import pytest
import torch

from engine import (
    CapacityError,
    Engine,
    EngineConfig,
    EngineError,
    InputError,
    NumericsError,
    Sample,
    SamplingParams,
    Tokenizer,
)
from engine.kernels.op import cpu_missing, use_backend
from tests.tiny import save_tiny_tokenizer, tiny_config

PROMPTS = [[5, 6, 7], [9] * 20]
LONG = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(directory)
    config = EngineConfig(dtype="float32", kv_tokens=1024, max_batch_tokens=128, max_seqs=16)
    return Engine.from_config(
        tiny_config(initializer_range=0.2), config, tokenizer=Tokenizer.from_pretrained(directory)
    )


@functools.cache
def with_eos(*eos: int) -> Engine:
    config = EngineConfig(dtype="float32", kv_tokens=1024, max_batch_tokens=128, max_seqs=16)
    return Engine.from_config(tiny_config(initializer_range=0.2, eos_token_id=list(eos)), config)


def test_results_come_per_prompt_and_sample(engine):
    results = engine.generate(PROMPTS, SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    assert [len(row) for row in results] == [3, 3]
    for prompt, row in zip(PROMPTS, results, strict=True):
        for completion in row:
            assert completion.prompt_token_ids == prompt
            assert len(completion.token_ids) == len(completion.logprobs) == 4
            assert completion.finish_reason == "length"
            assert completion.logprobs.dtype == torch.float32


def test_greedy_is_the_most_likely_token(engine):
    completion = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=1))
    (only,) = completion[0]
    assert [next(iter(t)) for t in only.top_logprobs] == only.token_ids


def test_same_seed_same_tokens_another_seed_others(engine):
    first, again, other = (
        engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=12, seed=s, ignore_eos=True)) for s in (1, 1, 2)
    )
    ids = lambda results: [c.token_ids for row in results for c in row]  # noqa: E731
    assert ids(first) == ids(again) != ids(other)


def test_samples_of_one_prompt_differ(engine):
    row = engine.generate([PROMPTS[0]], SamplingParams(n=4, max_tokens=12, seed=1, ignore_eos=True))[0]
    assert len({tuple(c.token_ids) for c in row}) == 4


def test_end_of_sequence_stops_and_is_part_of_the_tokens():
    free = with_eos(2).generate([PROMPTS[0]], LONG)[0][0].token_ids
    eos = free[4]
    engine = with_eos(eos)
    stopped = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=12, seed=1))[0][0]
    assert stopped.token_ids == free[: free.index(eos) + 1]
    assert stopped.finish_reason == "stop"
    assert engine.generate([PROMPTS[0]], LONG)[0][0].token_ids == free


def test_stop_token_ids_stop(engine):
    free = engine.generate([PROMPTS[0]], LONG)[0][0].token_ids
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1, stop_token_ids=(free[3],))
    stopped = engine.generate([PROMPTS[0]], params)[0][0]
    assert stopped.token_ids == free[: free.index(free[3]) + 1]
    assert stopped.finish_reason == "stop"


def test_stop_string_ends_the_text_before_it(engine):
    free = engine.generate([PROMPTS[0]], LONG)[0][0]
    text = engine.tokenizer.decode(free.token_ids)
    stop = text[5:8]
    assert stop, "the sampled text is too short to test with"
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1, stop=(stop,))
    stopped = engine.generate([PROMPTS[0]], params)[0][0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


def test_alternatives_hold_the_sampled_tokens_logprob_when_it_is_among_them(engine):
    only = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=8, seed=3, ignore_eos=True, logprobs=64))[0][0]
    assert len(only.top_logprobs) == 8
    seen = 0
    for token, value, choices in zip(only.token_ids, only.logprobs.tolist(), only.top_logprobs, strict=True):
        assert list(choices.values()) == sorted(choices.values(), reverse=True)
        if token in choices:
            seen += 1
            assert choices[token] == value
    assert seen > 0


def test_kept_mass_is_given_only_with_a_filter(engine):
    plain = engine.generate([PROMPTS[0]], LONG)[0][0]
    top_k = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=12, seed=1, top_k=3, ignore_eos=True))[0][0]
    assert plain.kept_mass is None
    assert ((top_k.kept_mass > 0) & (top_k.kept_mass < 1)).all()


def test_one_params_per_prompt(engine):
    each = [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(n=2, max_tokens=5, ignore_eos=True)]
    results = engine.generate(PROMPTS, each)
    assert [[len(c.token_ids) for c in row] for row in results] == [[2], [5, 5]]


def test_stream_gives_the_tokens_of_generate(engine):
    params = SamplingParams(n=2, max_tokens=9, seed=4, ignore_eos=True)
    whole = engine.generate(PROMPTS, params)
    parts: dict[tuple[int, int], list[int]] = {}
    texts: dict[tuple[int, int], str] = {}
    done = {}
    for event in engine.stream(PROMPTS, params):
        key = (event.prompt_index, event.sample_index)
        parts.setdefault(key, []).extend(event.token_ids)
        texts[key] = texts.get(key, "") + event.text
        if event.completion:
            done[key] = event.completion
    for p, row in enumerate(whole):
        for s, completion in enumerate(row):
            assert parts[p, s] == completion.token_ids == done[p, s].token_ids
            assert completion.text == texts[p, s]


def test_closing_a_stream_frees_its_sequences(engine):
    stream = engine.stream(PROMPTS, SamplingParams(n=2, max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert engine.sampler.num_unfinished == 0
    assert engine.sampler.cache.num_free == engine.sampler.cache.num_pages


def test_abort_ends_one_prompt_and_leaves_the_other(engine):
    stream = engine.stream(PROMPTS, SamplingParams(max_tokens=30, seed=1, ignore_eos=True))
    done = {}
    for index, event in enumerate(stream):
        if index == 4:
            stream.abort(prompt_index=0)
        if event.completion:
            done[event.prompt_index] = event.completion
    assert done[0].finish_reason == "abort"
    assert 0 < len(done[0].token_ids) < 30
    assert len(done[1].token_ids) == 30


def test_abort_of_the_engine_ends_every_stream(engine):
    stream = engine.stream(PROMPTS, SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream)
    engine.abort()
    assert {e.completion.finish_reason for e in stream if e.completion} == {"abort"}
    assert engine.sampler.num_unfinished == 0


def test_a_stream_that_nobody_reads_ends_with_its_last_reference(engine):
    stream = engine.stream(PROMPTS, LONG)
    assert engine.sampler.num_unfinished == 2
    del stream
    assert engine.sampler.num_unfinished == 0


def test_stop_strings_without_a_tokenizer_are_refused_before_anything_waits():
    engine = with_eos(2)
    with pytest.raises(InputError, match="needs a tokenizer"):
        engine.generate(PROMPTS, [LONG, SamplingParams(stop=("x",))])
    assert engine.sampler.num_unfinished == 0


def test_two_streams_at_once_give_what_each_gives_alone(engine):
    params = SamplingParams(max_tokens=8, seed=6, ignore_eos=True)
    alone = [engine.generate([p], params)[0][0].token_ids for p in PROMPTS]
    streams = [engine.stream([p], params) for p in PROMPTS]
    got: list[list[int]] = [[], []]
    for first, second in zip(*streams, strict=False):
        got[0] += first.token_ids
        got[1] += second.token_ids
    assert [g[:7] for g in got] == [a[:7] for a in alone]


def test_optimizer_step_is_refused_while_something_streams(engine):
    stream = engine.stream([PROMPTS[0]], LONG)
    next(stream)
    with pytest.raises(EngineError, match="still being sampled"):
        engine.optim_step(1e-3)
    stream.close()


def test_weight_update_drops_the_prefix_cache():
    engine = Engine.from_config(tiny_config(), EngineConfig(dtype="float32", kv_tokens=1024, max_batch_tokens=128))
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.generate([[7] * 40], params)
    assert engine.generate([[7] * 40], params)[0][0].num_cached_tokens == 32
    engine.forward_backward([Sample(tokens=[1, 2, 3], loss_mask=[0, 1, 1])])
    engine.optim_step(1e-3)
    completion = engine.generate([[7] * 40], params)[0][0]
    assert (completion.num_cached_tokens, completion.weight_version) == (0, 1)


@pytest.mark.parametrize(
    ("prompts", "params", "kind", "message"),
    [
        ([[]], None, InputError, "prompt 0 is empty"),
        ([[1], [2, 304]], None, InputError, "prompt 1 holds token id 304; the vocabulary is 0 to 303"),
        ([[-1]], None, InputError, "token id -1"),
        ([[1] * 512], None, InputError, "512 tokens; the model's context is 512"),
        ("text", None, InputError, "one string"),
        ([[1], [2]], [SamplingParams()], InputError, "1 SamplingParams for 2 prompts"),
    ],
)
def test_bad_input_is_named_and_the_engine_stays_usable(engine, prompts, params, kind, message):
    with pytest.raises(kind, match=message):
        engine.generate(prompts, params)
    assert engine.sampler.num_unfinished == 0
    assert len(engine.generate(PROMPTS, LONG)) == 2


def test_prompt_longer_than_the_pool_is_refused():
    engine = Engine.from_config(tiny_config(), EngineConfig(dtype="float32", kv_tokens=64, max_batch_tokens=32))
    with pytest.raises(CapacityError, match="70 tokens; the KV pool holds 64"):
        engine.generate([[1] * 70])
    assert len(engine.generate([[1] * 60], LONG)[0][0].token_ids) == 5  # the pool's end is the sequence's end


@pytest.mark.parametrize("field", [{"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}, {"min_p": 1.0}])
def test_bad_sampling_params_are_refused(field):
    (name,) = field
    with pytest.raises(InputError, match=f"SamplingParams.{name} is "):
        SamplingParams(**field)


def test_logits_that_are_not_finite_raise_and_leave_no_sequence():
    engine = Engine.from_config(tiny_config(), EngineConfig(dtype="float32", kv_tokens=256, max_batch_tokens=64))
    engine.model.norm.data[3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        engine.generate([[1, 2, 3]], LONG)
    assert engine.sampler.num_unfinished == 0
    engine.model.norm.data[3] = 1.0
    assert len(engine.generate([[1, 2, 3]], LONG)[0][0].token_ids) == 12


def test_an_interrupt_in_a_step_frees_everything_and_the_engine_stays_usable(monkeypatch):
    engine = with_eos(2)
    params = SamplingParams(n=3, max_tokens=12, seed=1, ignore_eos=True)
    before = [c.token_ids for c in engine.generate([PROMPTS[1]], params)[0]]
    other = engine.stream([PROMPTS[0]], params)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.sampler.runner, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([PROMPTS[1]], params)
    assert engine.sampler.num_unfinished == 0
    assert engine.sampler.cache.num_free == engine.sampler.cache.num_pages
    with pytest.raises(EngineError, match="submit it again"):
        next(other)
    assert [c.token_ids for c in engine.generate([PROMPTS[1]], params)[0]] == before


@pytest.mark.skipif(bool(cpu_missing()), reason="no kernels are built")
def test_a_forward_of_torch_definitions_is_not_recorded(engine):
    """A recording made before, or one that holds no kernel, would replay something else."""
    prompts, params = [[5, 6, 7], [9] * 20], SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    engine.sampler.cache.forget()
    before = engine.generate(prompts, params)
    with use_backend("torch"):
        assert not engine.model.recordable
        engine.sampler.cache.forget()
        torch_only = engine.generate(prompts, params)
    assert engine.model.recordable
    engine.sampler.cache.forget()
    after = engine.generate(prompts, params)
    for (a,), (b,), (c,) in zip(before, torch_only, after, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        torch.testing.assert_close(b.logprobs, a.logprobs, rtol=0.0, atol=1e-4)
        assert not torch.equal(b.logprobs, a.logprobs), "the kernels ran, and not torch's definitions"
        assert torch.equal(c.logprobs, a.logprobs)
