//! Which routes does the dashboard have?

use actix_web::middleware::from_fn;
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};

use super::{Dashboard, access, actions, assets, pages, replay};
use crate::api::error::ApiError;

/// Adds them to an application, which has the state of the API besides.
pub fn routes(config: &mut ServiceConfig, dashboard: &Dashboard) {
    config
        .app_data(web::Data::new(dashboard.clone()))
        .route("/admin", web::get().to(assets::page))
        .route("/admin/assets/{build}/{path:.+}", web::get().to(assets::asset))
        .route("/admin/api/login", web::post().to(access::login))
        .service(
            web::scope("/admin/api")
                .wrap(from_fn(access::admin))
                .route("/logout", web::post().to(access::logout))
                .route("/me", web::get().to(access::me))
                .route("/overview", web::get().to(pages::overview))
                .route("/history", web::get().to(pages::history))
                .route("/map", web::get().to(pages::map))
                .route("/tenants", web::get().to(pages::tenants))
                .route("/sessions", web::get().to(pages::sessions))
                .route("/sessions/{id}", web::get().to(pages::session))
                .route("/sessions/{id}/{verb}", web::post().to(actions::act))
                .route("/evictions", web::get().to(pages::evictions))
                .route("/policy", web::get().to(pages::policy))
                .route("/policy/replay", web::post().to(replay::replay))
                .route("/stream", web::get().to(pages::stream))
                .route("/undo/{token}", web::post().to(actions::undo))
                .default_service(web::to(|request: HttpRequest| async move {
                    Err::<HttpResponse, _>(ApiError::unknown_url(request.method().as_str(), request.path()))
                })),
        );
}
