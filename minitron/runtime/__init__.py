"""The process: environment, device, process group, artefacts, progress, launching."""
