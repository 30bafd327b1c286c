//! Which port of the proxy leads where, in memory, and the listeners that go with it.
//!
//! The store has the truth; this is a copy, at most ten thousand entries, so that a request needs no query.

use super::error::MachineError;
use crate::store::ServiceRoute;
use async_trait::async_trait;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use torpor_api::MachineId;
use torpor_api::http::{ServiceAuth, ServiceKind};

/// Opens and closes the proxy's ports.
#[async_trait]
pub trait Listeners: Send + Sync + 'static {
    /// Accept on this port from now on.
    ///
    /// # Errors
    /// The port cannot be bound.
    fn open(&self, listen_port: u16, kind: ServiceKind) -> Result<(), MachineError>;
    /// Accept no more; answers when the port is free.
    async fn close(&self, listen_port: u16);
}

#[derive(Default)]
struct Known {
    by_port: HashMap<u16, ServiceRoute>,
    by_machine: HashMap<MachineId, BTreeSet<u16>>,
}

/// The routes of all services.
#[derive(Default)]
pub struct Routes {
    known: RwLock<Known>,
    listeners: OnceLock<Arc<dyn Listeners>>,
}

impl Routes {
    /// Say who listens. Only the first one counts.
    pub fn attach(&self, listeners: Arc<dyn Listeners>) {
        let _ = self.listeners.set(listeners);
    }

    /// Add a route and listen.
    ///
    /// # Errors
    /// The port cannot be bound; there is no route then.
    pub fn open(&self, route: ServiceRoute) -> Result<(), MachineError> {
        let (port, kind) = (route.listen_port, route.kind);
        let mut routes = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // Exposing what is exposed must not bind twice; who may reach it may have changed.
        if let Some(known) = routes.by_port.get_mut(&port)
            && (&known.machine, known.port, known.kind) == (&route.machine, route.port, route.kind)
        {
            *known = route;
            return Ok(());
        }
        if let Some(listeners) = self.listeners.get() {
            listeners.open(port, kind)?;
        }
        routes
            .by_machine
            .entry(route.machine.clone())
            .or_default()
            .insert(port);
        routes.by_port.insert(port, route);
        Ok(())
    }

    /// Where a port leads.
    #[must_use]
    pub fn find(&self, listen_port: u16) -> Option<ServiceRoute> {
        self.routes().by_port.get(&listen_port).cloned()
    }

    /// Where a port of a machine is exposed; of several places the one that asks for most.
    #[must_use]
    pub fn of(&self, machine: &MachineId, port: u16) -> Option<ServiceRoute> {
        let asks_for = |route: &ServiceRoute| match route.auth {
            ServiceAuth::None => 0,
            ServiceAuth::ApiKey => 2,
            ServiceAuth::Token => 1,
        };
        let routes = self.routes();
        let ports = routes.by_machine.get(machine)?;
        ports
            .iter()
            .filter_map(|listen_port| routes.by_port.get(listen_port))
            .filter(|route| route.port == port)
            .max_by_key(|route| asks_for(route))
            .cloned()
    }

    /// Take a route away and stop listening.
    pub async fn close(&self, listen_port: u16) {
        {
            let mut routes = self.known.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(route) = routes.by_port.remove(&listen_port)
                && let Some(ports) = routes.by_machine.get_mut(&route.machine)
            {
                ports.remove(&listen_port);
                if ports.is_empty() {
                    routes.by_machine.remove(&route.machine);
                }
            }
        }
        if let Some(listeners) = self.listeners.get() {
            listeners.close(listen_port).await;
        }
    }

    fn routes(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}
