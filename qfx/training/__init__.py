"""Fake quantization in live modules, schedules, distillation, adapters."""
