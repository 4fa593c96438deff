"""The devices a run gets: its layout on them, the mesh, the processes."""
