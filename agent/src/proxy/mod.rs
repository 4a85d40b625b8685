//! Ties capture, tunnel and relay together: one accept loop per listener of an enrolled pod.
