"""Results as rows: one for each model, task, policy, budget and seed."""
