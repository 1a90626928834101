"""What the 16 MB need not pay for: tools that examine, compare and keep runs. They import train_gpt, never the
other way round."""
