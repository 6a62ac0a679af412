"""What happens between `sanrun CMD` and CMD: checks, the compiled table, the environment."""
