"""What every stage stands on: store, stage seam, tracking, settings, hardware facts."""
