"""Devices and hosts: the mesh, sharding rules, start of several processes, preemption, watchdog."""
