"""Ways in from other tools: data, metrics, records, explanations, trainers."""
