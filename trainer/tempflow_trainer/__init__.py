"""Training of text-to-image flow models with TempFlow-GRPO."""
