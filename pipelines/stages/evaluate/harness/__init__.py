"""lm-eval (EleutherAI's harness) in process: tasks from the hub or local files, models of ours as its `LM`."""
