"""Tools that examine, compare and keep runs, and do not count towards the 16 MB. They import train_gpt, never the other
way round."""
