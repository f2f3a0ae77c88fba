"""Cloud TPU slices: create, launch, watch, delete. Each runs gcloud, or shows with --dry_run what it would run."""
