"""Selection inside other trainers: Hugging Face, Accelerate, Lightning. Each process holds the same Selector."""
