//! A command in the guest, run to its end by the client of the guest agent.

use torpor_agent::guest_client::channel::last_frame;
use torpor_agent::guest_client::{GuestClient, GuestClientError};
use torpor_api::guest::{ExecSpec, FrameType, GuestResponse};

/// Run a command to its end: exit code, standard output and standard error.
pub async fn run_to_end(
    guest: &GuestClient,
    spec: ExecSpec,
) -> Result<(Option<i32>, Vec<u8>, Vec<u8>), GuestClientError> {
    let mut channel = guest.exec(spec).await?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let frame = channel.receiver.next().await?;
        match frame.kind {
            FrameType::Started => {}
            FrameType::Stdout => stdout.extend_from_slice(&frame.payload),
            FrameType::Stderr => stderr.extend_from_slice(&frame.payload),
            _ => match last_frame(&frame)? {
                GuestResponse::Exited { code, .. } => return Ok((code, stdout, stderr)),
                other => panic!("{other:?}"),
            },
        }
    }
}
