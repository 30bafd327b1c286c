#!/bin/sh
# Stands in for the kernel's init= so that something in the guest can talk to PID 1, then becomes it.
mount -t proc proc /proc
python3 /boot-check.py >/dev/console 2>&1 &
exec /usr/local/bin/torpor-guest --listen unix:/dev/agent.sock
