"""Group-relative policy optimisation (GRPO, arXiv 2402.03300; variants by configuration), on one page.

Sampling and the gradient step run on the same weights in the same process, so each step begins with the policy it
trains: there are no weights to send, no old log-probabilities to recompute, and what was sampled is checked to the bit.
"""

from __future__ import annotations

from engine import SamplingParams
from rl.batch import check_exact, require_progress, select, to_sample
from rl.record import step_record
from rl.rollout import Rollout, derive_seed
from rl.run import Run


def train(run: Run) -> None:
    """Runs the steps that are left, and leaves a checkpoint; or, when interrupted, a saved state.

    Step k is a function of (configuration, k, weights): its problems and its seeds do not depend on how it was come
    to, so a run that was killed and resumed ends with the weights of one that was not.
    Raises ExactnessError, EngineError.
    """
    config, engine = run.config, run.engine
    while run.step < config.steps and not run.interrupted:
        groups = rollout(run)
        batch = select(groups, config, engine.weight_version)
        require_progress(batch)
        stats = update = None
        with run.watch.time("training"):
            if batch.trained:
                samples = [to_sample(rollout, config.temperature) for rollout in batch.trained]
                stats = engine.forward_backward(samples, config.loss)
        with run.watch.time("checking"):
            difference = check_exact(engine, batch, stats, config)
        with run.watch.time("training"):
            if batch.trained:
                update = engine.optim_step(learning_rate=config.schedule.at(run.step, config.steps))
        record = step_record(run, batch, stats, update, difference)
        run.step += 1
        if config.evaluation.every and run.step % config.evaluation.every == 0:
            record |= run.evaluate()
        run.report(record, groups)
        if run.step % config.save_every == 0 or run.interrupted:
            run.save()
    run.finish()


def rollout(run: Run) -> list[list[Rollout]]:
    """The groups of this step. While too few have rewards that differ, new problems are tried, a bounded number of
    rounds (dynamic sampling, DAPO, arXiv 2503.14476); all groups are returned, and all are counted."""
    config = run.config
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature)
    groups: list[list[Rollout]] = []
    missing = config.prompts_per_step
    for attempt in range(1 + config.resample_rounds):
        first = (run.step * (1 + config.resample_rounds) + attempt) * config.prompts_per_step
        problems = [run.env.problem(first + index, config.seed) for index in range(missing)]
        seed = derive_seed(config.seed, "rollout", run.step, attempt)
        fresh = run.collector.collect(problems, config.group_size, params, seed, first_group=len(groups))
        groups += fresh
        missing -= sum(len({rollout.reward for rollout in group if rollout.failure is None}) > 1 for group in fresh)
        if missing <= 0:
            break
    return groups
