//! Two nodes and a control plane.

use std::time::{Duration, Instant};

use anyhow::Result;
use testbed::{
    Testbed,
    kube::{ControlPlane, ControlPlaneOptions, Parts},
    pace::patience,
};

/// Fields drop in order.
pub struct World {
    pub plane: ControlPlane,
    pub bed: Testbed,
}

impl World {
    pub fn new(label: &str) -> Result<Self> {
        Self::with(label, &[])
    }

    /// With further arguments of the API server.
    pub fn with(label: &str, api_arguments: &[&str]) -> Result<Self> {
        let parts = Parts::find()?;
        let bed = Testbed::new(label)?;
        let api_arguments = api_arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let options = ControlPlaneOptions { api_arguments, ..ControlPlaneOptions::default() };
        Ok(Self { plane: ControlPlane::start(&bed, parts, options)?, bed })
    }
}

/// Waits until `check` succeeds; what it waits for happens in another process that announces nothing.
pub fn eventually<T>(within: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let within = patience(within);
    let deadline = Instant::now() + within;
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("not within {within:?}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
