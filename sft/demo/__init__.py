"""The demonstration: a small closed world on which learning and forgetting can be measured in minutes on CPUs."""
