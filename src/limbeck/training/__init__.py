"""The core: taps, teachers, methods, phases, the trainer and the run folder. It knows no paper."""
