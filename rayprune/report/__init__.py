"""Pictures of finished runs, made from the files in their folders alone."""
