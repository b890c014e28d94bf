"""Post-training on the engine: environments, rollouts, GRPO, supervised fine-tuning, evaluation, the demo."""
