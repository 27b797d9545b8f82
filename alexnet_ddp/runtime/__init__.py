"""What a process needs in order to run: ranks, signals, the watchdog, files, output, exit codes."""
