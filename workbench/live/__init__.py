"""One model served to many viewers: prompts, interventions by click, original and edited answers side by side."""
