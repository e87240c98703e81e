"""Policy gradients over trees of rollouts: flat GRPO, BranchGRPO, Dynamic-TreeRPO and relatives as schedules."""
