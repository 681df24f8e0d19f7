"""The problem: trajectories, policies, posteriors, and a sampler that records what it drew."""
