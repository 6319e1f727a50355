"""What runs in the sandbox's own processes, started by file: it imports nothing of the package around it.

The keeper forks a warden for each interpreter; the warden confines itself, forks the interpreter, and stands between it
and the world.
"""
