//! `/image`: templates as images, and the vendor's names for the smallest of them.

use super::super::error::{Failure, cut};
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use torpor_api::ErrorCode;
use utoipa::ToSchema;

/// What an image that the vendor has stands for here.
const BASE: &str = "base";
const VENDOR_IMAGES: &[&str] = &["morphvm-minimal", "morphvm-sandbox"];

#[derive(Serialize, ToSchema)]
struct Image {
    id: String,
    object: &'static str,
    name: String,
    description: String,
    /// MiB.
    disk_size: u32,
    created: u64,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Images {
    object: &'static str,
    data: Vec<Image>,
}

pub(super) async fn list(State(fleet): State<Fleet>) -> Json<Images> {
    let templates = fleet.hypervisor().templates().await;
    let image = |id: &str, template: &crate::machine::hypervisor::TemplateInfo| Image {
        id: id.to_owned(),
        object: "image",
        name: id.to_owned(),
        description: template.description.clone(),
        disk_size: template.disk_mib,
        created: 0,
    };
    let mut data: Vec<Image> = templates
        .iter()
        .map(|template| image(&template.name, template))
        .collect();
    if let Some(base) = templates.iter().find(|template| template.name == BASE) {
        let named_so = |name: &&&str| !templates.iter().any(|template| template.name == **name);
        data.extend(
            VENDOR_IMAGES
                .iter()
                .filter(named_so)
                .map(|name| image(name, base)),
        );
    }
    Json(Images { object: "list", data })
}

/// The template that an image ID names.
pub(super) async fn template(fleet: &Fleet, image: &str) -> Result<String, Failure> {
    let known = fleet.hypervisor().template(image).await;
    match known {
        Some(template) => Ok(template.name),
        None if VENDOR_IMAGES.contains(&image) => Ok(BASE.to_owned()),
        None => Err(Failure::new(
            ErrorCode::TemplateNotFound,
            format!("no snapshot or image {:?}", cut(image)),
        )),
    }
}
