"""The engine of policy-gradient methods: rollouts, advantages, objectives, ratios, and its self-check."""
