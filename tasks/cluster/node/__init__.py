"""The local node: replicas as processes behind one gateway with a stable address.

Run it as `python -m tasks.cluster.node`.

state.py       what is written to disk and sent over the wire
policy.py      what a control call changes, as pure functions; rolling.py: the next step of a rolling replacement
store.py       the state folder; processes.py: starting, finding and ending replica processes
fleet.py       the replicas of this moment; upstream.py: HTTP connections to them
supervisor.py  drives the fleet to the desired state
gateway.py     the data plane; mirror.py: copies to a track whose answers nobody sees; counters.py, metrics.py
node.py        all of it put together; control.py: the control API
"""
