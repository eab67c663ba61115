"""How facts are memorized: the methods of training, the loop over epochs, and a whole run with its checkpoints."""

from lamini_jax.training.dense_methods import FullMethod, LoraMethod
from lamini_jax.training.memory_method import MemoryMethod
from lamini_jax.training.method import TrainMethod
from lamini_jax.training.run import Run, Tuned, lora_run, memory_run

__all__ = ["FullMethod", "LoraMethod", "MemoryMethod", "Run", "TrainMethod", "Tuned", "lora_run", "memory_run"]
