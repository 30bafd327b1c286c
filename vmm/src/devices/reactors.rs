//! What the two device threads do when something is ready.
//!
//! Tokens: kicks are device and queue, the tap and the vsock listener have one each, vsock connections everything
//! above the listener's.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::sys::epoll::EpollFlags;
use vmm_sys_util::eventfd::EventFd;

use super::balloon::{self, Balloon};
use super::blk::{self, Blk};
use super::mmio::{MmioDevice, VirtioDevice};
use super::net::{self, Net};
use super::rng::{self, Rng};
use super::vsock::{self, Vsock};
use super::worker::{self, Reactor};

const NET_KICK: u64 = 0x10;
const VSOCK_KICK: u64 = 0x20;
const RNG_KICK: u64 = 0x30;
const BALLOON_KICK: u64 = 0x40;
const QUEUE_BITS: u64 = 0xf;
/// The tap's token.
pub(crate) const TAP: u64 = 0x50;
/// The vsock listener's token.
pub(crate) const LISTENER: u64 = 0x100;

/// The disk thread.
#[derive(Debug)]
pub(crate) struct BlkReactor {
    pub(crate) blk: Arc<VirtioDevice<Blk>>,
}

impl BlkReactor {
    /// What to watch, and as what.
    pub(crate) fn kicks(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        (0..).zip(self.blk.kicks())
    }
}

impl Reactor for BlkReactor {
    fn on_ready(&mut self, _token: u64, _flags: EpollFlags, pause: &AtomicBool) {
        self.blk.kicks().iter().for_each(worker::silence);
        blk::serve(&self.blk, pause);
    }

    fn on_thaw(&mut self, pause: &AtomicBool) {
        blk::serve(&self.blk, pause);
    }
}

/// The thread of everything else.
#[derive(Debug)]
pub(crate) struct IoReactor {
    pub(crate) net: Arc<VirtioDevice<Net>>,
    pub(crate) vsock: Arc<VirtioDevice<Vsock>>,
    pub(crate) rng: Arc<VirtioDevice<Rng>>,
    pub(crate) balloon: Arc<VirtioDevice<Balloon>>,
}

impl IoReactor {
    /// What to watch, and as what.
    pub(crate) fn kicks(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        let net = (NET_KICK..).zip(self.net.kicks());
        let vsock = (VSOCK_KICK..).zip(self.vsock.kicks());
        let rng = (RNG_KICK..).zip(self.rng.kicks());
        let balloon = (BALLOON_KICK..).zip(self.balloon.kicks());
        net.chain(vsock).chain(rng).chain(balloon)
    }
}

impl Reactor for IoReactor {
    fn on_ready(&mut self, token: u64, flags: EpollFlags, pause: &AtomicBool) {
        let silence = |device: &dyn MmioDevice| {
            let queue = usize::try_from(token & QUEUE_BITS).ok();
            queue
                .and_then(|queue| device.kicks().get(queue))
                .map(worker::silence);
        };
        match token {
            TAP => net::serve(&self.net, pause),
            LISTENER.. => vsock::serve(&self.vsock, Some((token, flags)), pause),
            _ => match token & !QUEUE_BITS {
                NET_KICK => {
                    silence(&*self.net);
                    net::serve(&self.net, pause);
                }
                VSOCK_KICK => {
                    silence(&*self.vsock);
                    vsock::serve(&self.vsock, None, pause);
                }
                RNG_KICK => {
                    silence(&*self.rng);
                    rng::serve(&self.rng, pause);
                }
                BALLOON_KICK => {
                    silence(&*self.balloon);
                    balloon::serve(&self.balloon, pause);
                }
                _ => {}
            },
        }
    }

    fn on_thaw(&mut self, pause: &AtomicBool) {
        net::serve(&self.net, pause);
        vsock::serve(&self.vsock, None, pause);
        rng::serve(&self.rng, pause);
        balloon::serve(&self.balloon, pause);
    }
}
